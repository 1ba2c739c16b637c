"""What the scripts share. Imports run one way: scripts -> utils -> third-party packages."""
