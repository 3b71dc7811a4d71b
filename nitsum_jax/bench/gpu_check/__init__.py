"""What an accelerator does with the steps of this runtime, beside what it could do at most."""
