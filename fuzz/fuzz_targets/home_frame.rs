#![no_main]

farshore_fuzz::target!(recovery::fuzz::home_frame);
