#![no_main]

farshore_fuzz::target!(link::fuzz::join_token);
