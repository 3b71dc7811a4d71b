"""What an answer is made of: thoughts, text, and calls of tools, in the formats that models write them."""
