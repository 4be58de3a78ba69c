import subprocess
import sys

import pytest

import sanitize


def test_the_package_offers_every_stage_function() -> None:
    for name in sanitize.__all__:
        assert getattr(sanitize, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sanitize.nothing


def test_importing_the_package_alone_does_not_import_torch() -> None:
    code = "import sys, sanitize; assert 'torch' not in sys.modules; sanitize.Compute; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
