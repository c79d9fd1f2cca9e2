"""What tests, benchmarks and examples share: error budgets, inputs, tiny models, peers' code."""
