"""The two longest files of tests begin first, one on each worker, so that neither is left to the end."""
LONGEST = 'test_pipeline', 'test_pretexts'


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
