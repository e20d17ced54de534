"""Metrics of a node for Prometheus: what the files of its run say, read at each scrape."""
