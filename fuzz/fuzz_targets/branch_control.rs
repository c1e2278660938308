#![no_main]

farshore_fuzz::target!(recovery::fuzz::branch_control);
