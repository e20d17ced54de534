"""`dit-scale report`: one HTML file that explains runs, from the files that they have written. No torch.

thinning, curves    metrics.jsonl, read in a stream, as curves of a bounded number of points
panels              which curves share a chart
timeline            attempts, nodes and failures by wall-clock time
configs             what the configurations differ in, from a recipe and from each other
environment         where a run ran
pictures            grids of samples, within a budget of bytes
contents            everything about one run; document: everything about all of them, as HTML
"""
