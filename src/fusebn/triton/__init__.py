"""The four verbs on a GPU, in Triton: moments, normalize, backward_sums, backward.

They take PyTorch's tensors and promise what `csrc/core/batch_norm.h` promises. Their callers are in
``fusebn.torch``; nothing here knows a module or an argument rule.
"""
