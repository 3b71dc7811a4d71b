"""Text to ids and back: tokenizers, detokenizers, chat templates."""
