"""Requests with their arrival times: traces, synthetic ones, and the flags that name them."""
