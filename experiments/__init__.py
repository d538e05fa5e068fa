"""The paper's tables as scripts, and the recipe of the bundled checkpoint."""
