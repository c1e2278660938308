//! Moments as people write them: on the command line, in requests, in plans.

use replication::{PointTime, SequenceNumber};

use crate::points::Moment;

/// A text that is no moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no moment: {why}")]
pub struct MomentError {
    /// The text.
    pub text: String,
    /// What is wrong with it, and how it would be right.
    pub why: &'static str,
}

impl std::str::FromStr for Moment {
    type Err = MomentError;

    /// Reads a moment. Whatever is nothing else is a marker's name.
    fn from_str(text: &str) -> Result<Moment, MomentError> {
        let text = text.trim();
        let wrong = |why| MomentError { text: text.to_owned(), why };
        match text {
            "" => return Err(wrong("it is empty")),
            "latest" => return Ok(Moment::Latest),
            "latest-app" => return Ok(Moment::LatestApplication),
            _ => {}
        }
        if let Some(position) = text.strip_prefix('@') {
            return parse_sequence(position)
                .map(Moment::Sequence)
                .ok_or(wrong("after @ stands a position as `farshore vault points` shows it, such as @3.1042"));
        }
        if let Some(back) = text.strip_prefix('-')
            && back.starts_with(|first: char| first.is_ascii_digit())
        {
            let wrong = wrong("a way back is a whole number and s, m, h or d, such as -90s");
            return parse_back(back).map(Moment::Back).ok_or(wrong);
        }
        if looks_like_a_date(text) {
            return parse_time(text).map(Moment::At).ok_or(wrong(
                "a time is written \"2026-11-22 14:03:07\", in UTC, with a fraction of a second if need be",
            ));
        }
        Ok(Moment::Marker(text.to_owned()))
    }
}

fn looks_like_a_date(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() >= 8 && bytes[..4].iter().all(u8::is_ascii_digit) && bytes[4] == b'-'
}

fn parse_sequence(text: &str) -> Option<SequenceNumber> {
    if text.contains('.') { text.parse().ok() } else { text.parse().ok().map(SequenceNumber) }
}

fn parse_back(text: &str) -> Option<u64> {
    let split = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "s" | "" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// `2026-11-22 14:03:07.123`, with `T` for the space and `Z` or ` UTC` behind it if one likes; seconds may be missing.
fn parse_time(text: &str) -> Option<PointTime> {
    let text = text.trim().trim_end_matches("UTC").trim_end_matches('Z').trim_end();
    let (date, time) = text.split_once(['T', ' '])?;
    let mut date = date.split('-');
    let (year, month, day) = (number(date.next()?, 4)?, number(date.next()?, 2)?, number(date.next()?, 2)?);
    let (time, fraction) = time.trim_start().split_once('.').unwrap_or((time.trim_start(), "0"));
    let mut time = time.split(':');
    let (hour, minute) = (number(time.next()?, 2)?, number(time.next()?, 2)?);
    let second = time.next().map_or(Some(0), |second| number(second, 2))?;
    let complete = date.next().is_none() && time.next().is_none();
    let in_range = (1970..2500).contains(&year) && hour < 24 && minute < 60 && second < 60;
    if !complete || !in_range || !(1..=12).contains(&month) || !(1..=days_in_month(year, month)).contains(&day) {
        return None;
    }
    if fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let nanoseconds = fraction.parse::<u64>().ok()? * 10_u64.pow(9 - fraction.len() as u32);
    let seconds = ((days_before(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(PointTime(seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)?))
}

fn number(text: &str, digits: usize) -> Option<u64> {
    let well_formed = text.len() == digits && text.bytes().all(|digit| digit.is_ascii_digit());
    if well_formed { text.parse().ok() } else { None }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to the date.
fn days_before(year: u64, month: u64, day: u64) -> u64 {
    let years: u64 = (1970..year).map(|year| 365 + u64::from(is_leap(year))).sum();
    let months: u64 = (1..month).map(|month| days_in_month(year, month)).sum();
    years + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use world::WallTime;

    #[test]
    fn moments_are_read_as_people_write_them() {
        let at = Moment::At(PointTime(1_795_356_187_000_000_000));
        for (text, moment) in [
            ("latest", Moment::Latest),
            (" latest-app ", Moment::LatestApplication),
            ("2026-11-22 14:03:07", at.clone()),
            ("2026-11-22T14:03:07Z", at.clone()),
            ("2026-11-22 14:03:07.000 UTC", at),
            ("-90s", Moment::Back(90)),
            ("-2m", Moment::Back(120)),
            ("-1d", Moment::Back(86_400)),
            ("@3.1042", Moment::Sequence(SequenceNumber(3 * (1 << 44) + 1042))),
            ("@77", Moment::Sequence(SequenceNumber(77))),
            ("before update", Moment::Marker("before update".into())),
        ] {
            assert_eq!(text.parse(), Ok(moment), "{text}");
        }
        for text in ["", "@x", "-9y", "2026-13-01 00:00:00", "2026-02-30 10:00:00", "2026-11-22 24:00:00", "2026-11-22"]
        {
            assert!(text.parse::<Moment>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn every_printed_time_is_read_back() {
        for seconds in [0, 951_782_400, 1_709_210_096, 1_795_356_187, 4_107_542_400] {
            let time = PointTime(seconds * 1_000_000_000 + 123_000_000);
            assert_eq!(parse_time(&WallTime(time.0).to_string()), Some(time));
        }
    }
}
