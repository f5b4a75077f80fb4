"""HTML pages as tests look at them: well-formed, and loading nothing."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "image", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects attributes and text, and checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.ids, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(html: str) -> Page:
    """The page, all of whose tags are closed."""
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def check_self_contained(html: str, page: Page) -> None:
    """Nothing is loaded from anywhere, ids are unique and references lead to them."""
    for tag, name, value in page.attributes:
        if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
            assert value.startswith(("#", "data:")), (tag, name, value)
        if name == "href" and value.startswith("#"):
            assert value[1:] in page.ids
        if "url(#" in value:
            assert value.split("url(#")[1].split(")")[0] in page.ids
    for word in ("http:", "https:", "//cdn", "@import", "<iframe", "<object"):
        assert word not in html
    assert not {t for t, n, v in page.attributes if n == "src"}
    assert len(page.ids) == len(set(page.ids))
    assert "#010101" not in html, "a stand-in colour was left in a plot"
