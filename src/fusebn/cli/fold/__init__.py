"""`fusebn fold`: the batch norms of an ONNX file, folded into the layers beside them.

`command` the command line, `table` what it prints, `files` reading and writing, `answers` whether
both models say the same.
"""

from fusebn.cli.fold.command import fold

__all__ = ["fold"]
