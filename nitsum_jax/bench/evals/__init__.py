"""Whether a served model is the model: likelihoods of texts beside those of transformers."""
