"""Any batch, the same accuracy? Training that lasts as long as the gain asks, against fixed
schedules with as many iterations, in a setting that is not short of images.

    python -m benchmarks.any_batch run --arm gain --batch 128
    python -m benchmarks.any_batch grid              # all that is missing, two runs side by side
    python -m benchmarks.any_batch tables --write    # docs/evidence-tables.md

A finished run is one line of benchmarks/results/any_batch.jsonl; a grid that was stopped goes on
where it was.
"""
