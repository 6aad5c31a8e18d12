"""`fusebn bench`: speed beside a checked answer, against the floor memory sets and against peers.

One subject a file: `cases` what is asked, `inside` the way to the library's private side,
`answers` whether one is right, `ours` and `peers` who gives them, `worker` a peer's own process,
`timing` and `runner` the measuring, `asides` the tiny call and the busy core, `machine` where;
`results` the JSON, `report` the tables, `plot` the picture, `command` the command line; `device`
the same of a GPU.
"""

from fusebn.cli.bench.command import bench

__all__ = ["bench"]
