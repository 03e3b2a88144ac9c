"""Every link of the built book leads somewhere, and no page needs another host: `python docs/links.py build/book`."""
import sys
from collections import namedtuple
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

Page = namedtuple('Page', 'ids links parts') # names of places; addresses of links; addresses of scripts, styles and pictures


class Reader(HTMLParser):
    "Collects what a page has and names."
    def __init__(self):
        super().__init__()
        self.page = Page(set(), [], [])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.page.ids.add(attributes.get('id'))
        if tag == 'a' and attributes.get('href'):
            self.page.links.append(attributes['href'])
        elif tag == 'link' and attributes.get('href'):
            self.page.parts.append(attributes['href'])
        elif attributes.get('src'):
            self.page.parts.append(attributes['src'])


def read(path: Path) -> Page:
    reader = Reader()
    reader.feed(path.read_text(encoding='utf-8'))
    return reader.page


def wrong_links(folder: Path) -> list: # of sentences
    "What is wrong with the links of all pages."
    pages = {path.resolve(): read(path) for path in sorted(folder.rglob('*.html')) if '_static' not in path.parts}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for address in [*page.links, *page.parts]:
            parts = urlsplit(address)
            if parts.scheme == 'data':
                continue
            if parts.scheme or parts.netloc:
                if address in page.parts:
                    wrong.append(f'{name} needs another host: {address}')
                continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                wrong.append(f'{name}: {address} does not exist')
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f'{name}: {address} names no place in the page')
    return wrong


if __name__ == '__main__':
    found = wrong_links(Path(sys.argv[1]))
    print('\n'.join(found))
    sys.exit(bool(found))
