"""Many snapshots at once: walked, judged in chunks by any number of workers, kept as a dataset.

    inputs ──> chunks ──> workers ──────────────> parts ──> dataset
    files,     of names   read and judge, and     renamed   snapshots: what each vCPU carries
    folders,              answer with a table     into      verdicts:  what each host answers
    URLs                                          place     findings:  why

`inputs` expands what was named, `remote` reads ranges of an object in a store, `judging` is the
pure function that a worker runs, `dataset` has the tables and the folder they lie in, and `run`
leads the chunks through an executor. Nothing here judges: `xfast.check` does.
"""
