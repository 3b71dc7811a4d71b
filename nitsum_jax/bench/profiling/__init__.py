"""`nitsum-profile`: step-time profiles, measured on the devices present or derived from tables of kernel times."""
