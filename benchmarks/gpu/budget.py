"""How the seconds of gpu_acceptance.py are shared among its steps."""

# By step: its share of the budget. One that ends early leaves the rest to those after it.
STEPS = {
    "preflight": 30,
    "probe": 85,
    "numerics": 95,
    "repeatability": 75,
    "graphs": 20,
    "tuning": 60,
    "benchmark": 100,
    "comparison": 15,
}
BUDGET = 480
SOFT = 0.85  # of a step's limit: no case starts after it
