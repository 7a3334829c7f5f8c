"""Row kernels: forward KL, cross-entropy and their logit gradient for one chunk of logits, in place.

`rows` is the torch implementation, `triton_rows` the CUDA one with the same two functions, and `dispatch`
chooses between them.
"""
