"""Benchmarks behind the figures in the documentation; not part of the installed package.

python -m benchmarks.speed      time and memory of layers and networks
python -m benchmarks.paper      the comparisons of the papers
python -m benchmarks.weights    the trained weights and the networks they are compared with
"""
