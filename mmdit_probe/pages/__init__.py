"""Self-contained HTML pages: arrays and tables in, one file out, no server and no network. Knows no model."""

from mmdit_probe.pages.explorer import Exploration, explorer
from mmdit_probe.pages.page import Page
from mmdit_probe.pages.report import Section, report

__all__ = ["Exploration", "Page", "Section", "explorer", "report"]
