"""sanitize: the firewall for training data. Poisoned shards in, trusted data and models out.

The stage functions, in the order data meets them; each takes a config, finished artifacts, a folder and a `Compute`,
and returns one new artifact. Calling a stage again with the same arguments returns what is there.
"""

from importlib.metadata import version

__version__ = version("sanitize")
