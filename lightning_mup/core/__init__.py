"""The torch-only core: monomials, specs, rules, methods and the plan that joins them."""
