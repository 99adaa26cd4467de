"""`m2enc eval table`, `compare` and `report`: show results that `m2enc eval` wrote.

Not for measuring (cli/evaluate.py), nor for what is shown (eval/table.py, compare.py,
result_report.py).
"""

from json import dumps
from pathlib import Path
from typing import Literal


def table(
    results: list[Path],
    *,
    format: Literal["markdown", "csv", "html"] = "markdown",
    published: bool = False,
    out: Path | None = None,
) -> int:
    """Show results as a table: rows are models, columns metrics, a table for each protocol.

    Args:
        results: Result files, or folders that hold some.
        format: markdown, csv (unrounded) or html (a page that needs nothing else).
        published: Add published figures, marked where they were measured otherwise.
        out: File to write it to, instead of the terminal.
    """
    from m2encoder.eval.results import load_many
    from m2encoder.eval.table import make_tables
    from m2encoder.eval.table_formats import write_tables

    _show(write_tables(make_tables(load_many(results), published=published), format), out)
    return 0


def compare(a: Path, b: Path, *, json: bool = False, seed: int = 0, out: Path | None = None) -> int:
    """Compare two runs of the same task: differences with intervals, tests, queries won and lost.

    Unlike runs are refused, naming the first difference: another task, protocol, checksum,
    language or setting. Of two folders, what both measured is compared.

    Args:
        a: A result file or a folder of results, the one to compare with.
        b: Another one; differences are b less a.
        json: Print JSON instead of Markdown.
        seed: Seeds the draws of the paired bootstrap.
        out: File to write it to, instead of the terminal.
    """
    from m2encoder.eval.compare import compare_many
    from m2encoder.eval.compare_text import comparison_markdown
    from m2encoder.eval.results import load_many

    first, second = (load_many([path], with_ranks=True) for path in (a, b))
    compared = compare_many(first, second, seed=seed)
    if json:
        content = [each.to_json() for each in compared.comparisons]
        content = {"comparisons": content, "without_counterpart": compared.alone}
        _show(dumps(content, ensure_ascii=False, indent=2) + "\n", out)
    else:
        _show(comparison_markdown(compared), out)
    return 0


def report(
    results: list[Path],
    *,
    out: Path,
    images: Path | None = None,
    title: str = "Results",
    published: bool = False,
) -> int:
    """Write a page about results: numbers, worst classes, failures and successes with pictures.

    It needs no other file and no network. Pictures are read from the data that was measured.

    Args:
        results: Result files, or folders that hold some; languages of one data set are put
            side by side.
        out: The HTML file to write.
        images: Where the pictures lie, if not in the data any more: a folder, shards or a .tsv.
        title: What stands at the top.
        published: Show published figures beside ours.
    """
    from m2encoder.eval.page import write_page
    from m2encoder.eval.result_report import ResultReport, render_results
    from m2encoder.eval.results import load_many

    found = ResultReport(load_many(results), title=title, images=images, published=published)
    write_page(out, render_results(found))
    print(out)
    return 0


def _show(text: str, out: Path | None) -> None:
    from m2encoder.eval.page import write_page

    if out is not None:
        write_page(out, text)
    else:
        print(text.encode("utf-8", "backslashreplace").decode("utf-8"), end="")
