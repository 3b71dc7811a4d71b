"""Outputs that hold a form: schemas, expressions and grammars, compiled by llguidance for one tokenizer."""
