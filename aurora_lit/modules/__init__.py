"""Mathematics and networks, free of files, processes and clocks: sampling/, draft/, losses/, domains/."""
