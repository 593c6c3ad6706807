"""The composition root: joins config, data, actors and the loop into a run."""
