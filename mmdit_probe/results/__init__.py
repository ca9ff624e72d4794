"""Run folders: tidy tables with provenance. Knows no model; what is recorded about one is passed in."""

from mmdit_probe.results.folder import RunFolder, latest_run
from mmdit_probe.results.provenance import environment, peak_memory
from mmdit_probe.results.tables import TableWriter, read_items, read_table

__all__ = ["RunFolder", "TableWriter", "environment", "latest_run", "peak_memory", "read_items", "read_table"]
