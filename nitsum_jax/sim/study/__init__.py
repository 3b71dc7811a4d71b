"""The goodput study: what adaptive tensor parallelism is worth, from a config to a page (`make study`)."""
