"""One file per runtime of other people whose layout bundles can have; the table of targets names them."""
