#![no_main]

farshore_fuzz::target!(vault::fuzz::moment);
