"""What work costs: operations counted from shapes, and how many of each a machine does in a second."""

from surgeon.planning.rates import Rates, guess_rates, measure_rates
from surgeon.planning.work import NOTHING, Operation, Work

__all__ = ["NOTHING", "Operation", "Rates", "Work", "guess_rates", "measure_rates"]
