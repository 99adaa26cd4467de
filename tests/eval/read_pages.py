"""Read a page about results as its parts; and small pictures for it to show."""

import io
from html.parser import HTMLParser

from PIL import Image

from m2encoder.eval.markup import VOID
from m2encoder.eval.result_report import ResultReport, render_results


def picture(colour="red", size=(64, 64), kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def picture_folder(folder):
    """Fill a folder with four small pictures, and return it."""
    for name, colour in (("红.png", "red"), ("b.png", "blue"), ("c.png", "green")):
        (folder / name).write_bytes(picture(colour))
    (folder / "大.jpg").write_bytes(picture("gold", (900, 600), "JPEG"))
    return folder


class Page(HTMLParser):
    """Collects elements and text, and checks that every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.stack = [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.texts.append(data)

    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*results, **options):
    return Page(render_results(ResultReport(results, **options)))


def example(query, rank, right, found):
    key = "name" if query[-4:] != ".png" else "text"
    hits = [{key: each, "score": 0.5 - i / 10} for i, each in enumerate(found)]
    return {"query": query, "rank": rank, "right": right, "found": hits}
