"""`m2enc report`: a page about a training run.

Not for results on test data (`m2enc eval report`, cli/results.py).
"""

from pathlib import Path


def report(run: Path, *, out: Path | None = None) -> int:
    """Write a page about a training run: curves, speed, waiting, what happened, configuration.

    It needs no other file and no network, and works while the run is still going on.

    Args:
        run: The run's folder, the `out` of m2enc pretrain.
        out: The HTML file to write; by default training.html in the run's folder.
    """
    from m2encoder.eval.page import write_page
    from m2encoder.eval.run_report import read_run, render_run

    out = out or run / "training.html"
    write_page(out, render_run(read_run(run)))
    print(out)
    return 0
