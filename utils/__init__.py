"""The parts that the scripts share. Imports run one way: scripts -> utils -> third-party (design, section 2)."""
