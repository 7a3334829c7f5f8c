"""Models: shapes (`ladder`), what they cost (`flops`), Hugging Face directories (`hub`)."""
