"""How gpu_acceptance.py shares its seconds among its steps."""

# Each step's share of the budget. A step that ends early leaves its rest to the later ones.
STEPS = {
    "preflight": 30,
    "probe": 102,
    "numerics": 78,
    "repeatability": 82,
    "graphs": 20,
    "tuning": 60,
    "benchmark": 100,
    "comparison": 15,
}
BUDGET = 480
SOFT = 0.85  # share of a step's limit after which no new case starts
