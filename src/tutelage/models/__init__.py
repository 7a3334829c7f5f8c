"""Models: shapes, their FLOPs, and Hugging Face directories."""
