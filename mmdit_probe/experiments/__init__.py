"""Every analysis as one object: what is measured per item, how it is summed up, claimed and drawn."""
