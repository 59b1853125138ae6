from collections.abc import Sequence

import pytest


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    needing = [item for item in items if "gpu" in item.keywords]
    if not needing:
        return
    import torch  # costs seconds, which the layout test need not pay

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
