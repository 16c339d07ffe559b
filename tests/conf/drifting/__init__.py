"""A Hydra program of somebody else whose optimum drifts with the width, for tests of telescoping sweeps."""
