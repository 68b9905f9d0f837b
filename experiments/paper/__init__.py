"""The paper's figures and tables, beside ours."""
