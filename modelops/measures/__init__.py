"""Numbers: how far outputs differ, how well a task is done, how long a run takes, and what may be concluded.

Pure functions of arrays and figures: nothing here opens a model, runs one, or needs more than numpy. Verdicts can
therefore be derived again at any time from saved measurements.

::

    differences.py    what one output of two models differs by                           Difference
    comparison.py     how that is measured, over a stream of batches                     compare()
    gates.py          how far an output may move, by what was done to the model          Gate, TRANSITIONS
    judging.py        whether it stayed within, and whether the data can tell            judge()
    metrics.py        task metrics on labelled data                                      evaluate()
    drops.py          how much of one a change can have cost                             drop(), judge_drop()
    latency.py        summaries of latencies, with intervals                             summarize()
    verdicts.py       which of two models is faster, surely                              decide()
    tallies.py        streaming sums and histograms of bounded size
    distributions.py  quantiles and intervals
"""
