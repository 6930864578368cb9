"""HMP: the human monitor over a socket of its own, how its text and tables read, and its savevm, loadvm and delvm."""
