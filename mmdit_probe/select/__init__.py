"""From evidence per layer to the layers that later commands use."""

from mmdit_probe.select.selection import LayerSelection, load_selection

__all__ = ["LayerSelection", "load_selection"]
