"""The schedules themselves, a file a family: pure functions from a placement and a number of micro-batches to each rank's passes.

Free of torch. Every docstring shows its schedule as draw.py draws it, with F = I = W = 1, and says what it costs.
"""
