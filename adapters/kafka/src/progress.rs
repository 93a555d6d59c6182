//! What a group has done of a partition, as its committed offset and the metadata of the commit tell.
//!
//! Kafka keeps one offset for a partition: everything below it is settled. What was settled above it, what is out and
//! what is held back goes into the commit's metadata, so that the next owner skips it and `lag` can tell.

use std::fmt::Write as _;

/// The first word of the metadata; anything else was committed by another program.
const MARK: &str = "anybroker1";
/// The broker keeps 4,096 bytes (`offset.metadata.max.bytes`). What does not fit comes again.
const LONGEST: usize = 3_000;

/// One commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Commit {
    pub(crate) offset: i64,
    pub(crate) metadata: String,
}

/// What a commit tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) offset: i64,
    /// With an application when it was committed.
    pub(crate) out: u64,
    /// Held back until their time.
    pub(crate) held: u64,
    /// How many are settled above the offset.
    pub(crate) above: u64,
    /// Which: begin and (exclusive) end of each run.
    pub(crate) settled: Vec<(i64, i64)>,
}

impl Commit {
    /// Of everything below `read`, the ascending `unsettled` are unsettled; of what is above, the runs `later` are settled.
    pub(crate) fn new(
        offset: i64,
        out: usize,
        held: usize,
        unsettled: impl Iterator<Item = i64>,
        read: i64,
        later: impl Iterator<Item = (i64, i64)>,
    ) -> Self {
        let mut runs: Vec<(i64, i64)> = Vec::new();
        let mut reached = offset;
        for hole in unsettled {
            if hole > reached {
                runs.push((reached, hole));
            }
            reached = hole + 1;
        }
        if read > reached {
            runs.push((reached, read));
        }
        for (begin, end) in later.map(|(begin, end)| (begin.max(read), end)).filter(|(begin, end)| begin < end) {
            match runs.last_mut() {
                Some(last) if last.1 == begin => last.1 = end,
                _ => runs.push((begin, end)),
            }
        }
        if runs.is_empty() && out == 0 && held == 0 {
            return Self { offset, metadata: String::new() };
        }
        let above: i64 = runs.iter().map(|(begin, end)| end - begin).sum();
        let mut metadata = format!("{MARK} {out} {held} {above} ");
        let mut reached = offset;
        for (begin, end) in runs {
            if metadata.len() > LONGEST - 44 {
                break;
            }
            write!(metadata, "{}+{},", begin - reached, end - begin).expect("writing to a string cannot fail");
            reached = end;
        }
        Self { offset, metadata }
    }
}

impl Commit {
    /// Whether the same is settled; what is out and held back may differ.
    fn settled(&self) -> (i64, &str) {
        (self.offset, self.metadata.splitn(5, ' ').nth(4).unwrap_or_default())
    }

    pub(crate) fn settles_the_same(&self, other: &Self) -> bool {
        self.settled() == other.settled()
    }
}

impl Progress {
    pub(crate) fn read(offset: i64, metadata: &str) -> Self {
        Self::parse(offset, metadata).unwrap_or(Self { offset, ..Self::default() })
    }

    /// Whether what stands at `offset` is settled.
    pub(crate) fn holds(&self, offset: i64) -> bool {
        offset < self.offset || self.settled.iter().any(|(begin, end)| (*begin..*end).contains(&offset))
    }

    fn parse(offset: i64, metadata: &str) -> Option<Self> {
        let mut words = metadata.split(' ');
        if words.next()? != MARK {
            return None;
        }
        let mut progress = Self { offset, ..Self::default() };
        progress.out = words.next()?.parse().ok()?;
        progress.held = words.next()?.parse().ok()?;
        progress.above = words.next()?.parse().ok()?;
        let mut reached = offset;
        for run in words.next()?.split(',').filter(|run| !run.is_empty()) {
            let (gap, length) = run.split_once('+')?;
            let begin = reached.checked_add(gap.parse::<u32>().ok()?.into())?;
            reached = begin.checked_add(length.parse::<u32>().ok()?.into())?;
            progress.settled.push((begin, reached));
        }
        Some(progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(offset: i64, unsettled: &[i64], read: i64, later: &[(i64, i64)]) -> Progress {
        let commit = Commit::new(offset, 1, 2, unsettled.iter().copied(), read, later.iter().copied());
        assert!(commit.metadata.len() <= LONGEST);
        Progress::read(commit.offset, &commit.metadata)
    }

    #[test]
    fn what_was_settled_above_a_hole_is_told() {
        let told = round(10, &[10, 12, 13], 20, &[(25, 30)]);
        assert_eq!((told.offset, told.out, told.held), (10, 1, 2));
        assert_eq!(told.settled, [(11, 12), (14, 20), (25, 30)]);
        assert_eq!(told.above, 12);
    }

    #[test]
    fn a_prefix_without_holes_needs_no_metadata() {
        assert_eq!(Commit::new(7, 0, 0, [].into_iter(), 7, [].into_iter()).metadata, "");
        assert_eq!(Progress::read(7, ""), Progress { offset: 7, ..Progress::default() });
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_counted() {
        let holes: Vec<i64> = (0..5_000).map(|number| number * 2).collect();
        let told = round(0, &holes, 10_000, &[]);
        assert_eq!(told.above, 5_000);
        assert!(told.settled.len() > 300, "{}", told.settled.len());
        assert!(told.settled.iter().all(|(begin, end)| begin % 2 == 1 && *end == begin + 1));
    }

    #[test]
    fn the_metadata_of_others_tells_nothing() {
        for text in
            ["x", "anybroker1", "anybroker1 1", "anybroker1 a b c d", "anybroker1 1 1 1 5", "anybroker1 1 1 1 x+1"]
        {
            assert_eq!(Progress::read(3, text), Progress { offset: 3, ..Progress::default() }, "{text}");
        }
    }
}
