//! Plans and reports, with answerers that need no model.

use std::sync::Mutex;

use keye_eval::{AnswerError, Answerer, EvalError, Plan, Reply, Report, run};
use keye_media::{Loader, MediaConfig, MediaItem};
use keye_world::{Split, Task, World};

/// Answers by a function, and notes what it was asked. Answers that end with dots count as cut.
struct Scripted<F> {
    script: F,
    asked: Mutex<Vec<(bool, String)>>,
}

impl<F: Fn(&str) -> String + Sync> Answerer for Scripted<F> {
    fn answer(&self, media: Option<MediaItem>, question: &str) -> Result<Reply, AnswerError> {
        self.asked.lock().unwrap().push((media.is_some(), question.to_owned()));
        if let Some(item) = &media {
            let media = Loader::new(MediaConfig::slow_fast()).load(item, &mut |_| true)?;
            assert!(media.frames.len() >= 4 && media.frames[0].timestamp == Some(0.0));
        }
        let text = (self.script)(question);
        let cut = text.ends_with("...");
        Ok(Reply { text, cut })
    }
}

fn scripted<F: Fn(&str) -> String + Sync>(script: F) -> Scripted<F> {
    Scripted { script, asked: Mutex::default() }
}

fn plan(tasks: &[Task], count: u64) -> Plan {
    let (split, tasks) = (Split::Test, tasks.to_vec());
    Plan { split, tasks, count, text_only: true, square: None, clips: None, at_once: 2 }
}

fn truth(tasks: &[Task], count: u64) -> impl Fn(&str) -> String + Sync {
    let world = World::new(Split::Test);
    let turns: Vec<_> = (0..count)
        .flat_map(|index| tasks.iter().map(move |task| (*task, index)))
        .map(|(task, index)| world.question(task, index).turns.remove(0))
        .collect();
    move |question| {
        turns.iter().find(|turn| turn.question == question).map_or(String::new(), |turn| turn.answer.clone())
    }
}

#[test]
fn clips_reach_the_answerer_as_files() {
    let tasks = [Task::When, Task::Reading];
    let answerer = scripted(truth(&tasks, 2));
    let (mut steps, mut last) = (0, 0);
    let report = run(&answerer, &Plan { text_only: false, ..plan(&tasks, 2) }, &mut |step| {
        steps += 1;
        last = step.done;
        step.total == 4
    });
    assert_eq!((steps, last), (4, 4));
    let report = report.unwrap();
    assert_eq!(report.rows.iter().map(|row| (row.task, row.count)).collect::<Vec<_>>(), [(tasks[0], 2), (tasks[1], 2)]);
    assert_eq!(report.mean(), 1.0);
    assert!(answerer.asked.lock().unwrap().iter().all(|(media, _)| *media));
    assert!(report.table().contains("reading"), "{}", report.table());
}

/// A second run finds the clips of the first; squares are files of their own, and square.
#[test]
fn clips_are_written_once_and_squeezed_when_wanted() {
    struct Sizes(Mutex<Vec<[u32; 2]>>);
    impl Answerer for Sizes {
        fn answer(&self, media: Option<MediaItem>, _: &str) -> Result<Reply, AnswerError> {
            let Some(item) = media else { return Err(AnswerError::Stopped) };
            let media = Loader::new(MediaConfig::slow_fast()).load(&item, &mut |_| true)?;
            self.0.lock().unwrap().extend(media.frame_grids().map(|[_, h, w]| [h, w]));
            Ok(Reply { text: String::new(), cut: false })
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let clips = Some(folder.path().join("clips"));
    let plan = Plan { text_only: false, clips: clips.clone(), ..plan(&[Task::Count], 3) };
    let files = || -> Vec<_> {
        let mut files: Vec<_> = std::fs::read_dir(clips.as_ref().unwrap()).unwrap().map(|e| e.unwrap()).collect();
        files.sort_by_key(std::fs::DirEntry::path);
        files.iter().map(|file| (file.path(), file.metadata().unwrap().modified().unwrap())).collect()
    };
    let asked = |plan: &Plan| {
        let sizes = Sizes(Mutex::default());
        let report = run(&sizes, plan, &mut |_| true).unwrap();
        (report, sizes.0.into_inner().unwrap())
    };
    let (report, native) = asked(&plan);
    let first = files();
    assert_eq!(first.len(), 3);
    assert_eq!(asked(&plan).0, report);
    assert!(files() == first, "written once");
    assert!(native.iter().any(|[h, w]| h != w));
    let (_, squares) = asked(&Plan { square: Some(112), ..plan });
    assert!(squares.iter().all(|[h, w]| h == w), "{squares:?}");
    assert_eq!(files().len(), 6);
}

#[test]
fn silence_scores_nothing_and_yes_scores_about_half() {
    let mute = scripted(|_: &str| String::new());
    let report = run(&mute, &plan(&[Task::Attribute, Task::When, Task::Count], 20), &mut |_| true).unwrap();
    assert!(report.rows.iter().all(|row| row.score() == 0.0 && row.exact == 0.0 && row.chance > 0.0));
    assert!(mute.asked.lock().unwrap().iter().all(|(media, _)| !media));

    let yes = scripted(|_: &str| "Yes.".to_owned());
    let report = run(&yes, &plan(&[Task::Trap], 300), &mut |_| true).unwrap();
    assert!((0.2..0.6).contains(&report.rows[0].score()), "{report:?}");
}

/// What tells one report's questions from another's: all of them, in the same order whoever is asked first.
#[test]
fn reports_know_what_was_asked() {
    let mute = scripted(|_: &str| String::new());
    let asked = |plan: Plan| run(&mute, &plan, &mut |_| true).unwrap();
    let tasks = [Task::Count, Task::Trap];
    let report = asked(plan(&tasks, 8));
    assert_eq!((report.split, report.scoring), (Split::Test, keye_eval::SCORING));
    assert_eq!(report, asked(Plan { at_once: 5, ..plan(&tasks, 8) }));
    let differ = |other: Report| report.rows.iter().zip(other.rows).all(|(a, b)| a.questions != b.questions);
    assert!(differ(asked(plan(&tasks, 7))) && differ(asked(Plan { split: Split::Validation, ..plan(&tasks, 8) })));
    assert_ne!(report.rows[0].questions, report.rows[1].questions);
    assert_eq!(report.rows[0].questions, COUNTED, "the world has changed: no figure measured before can be compared");
}

/// Of the first eight questions of the test split that ask for a number.
const COUNTED: &str = "bc63e07088834f1a";

#[test]
fn cut_answers_are_counted() {
    let whole = scripted(|_: &str| "3".to_owned());
    let report = run(&whole, &plan(&[Task::Count], 4), &mut |_| true).unwrap();
    assert!(report.cut() == 0 && !report.table().contains("cut"), "{}", report.table());
    let cut = scripted(|question: &str| if question.contains("How many") { "3..." } else { "yes" }.to_owned());
    let report = run(&cut, &plan(&[Task::Count, Task::Trap], 9), &mut |_| true).unwrap();
    let cut = report.rows[0].cut;
    assert!(cut > 0 && report.rows[1].cut == 0 && report.cut() == cut, "{report:?}");
    assert!(report.table().ends_with(&format!("\n{cut} answers were cut by the limit of tokens: {cut} count\n")));
}

#[test]
fn a_failure_ends_it_and_so_does_the_caller() {
    struct Broken;
    impl Answerer for Broken {
        fn answer(&self, _: Option<MediaItem>, _: &str) -> Result<Reply, AnswerError> {
            Err(AnswerError::Stopped)
        }
    }
    let error = run(&Broken, &plan(&[Task::Count], 50), &mut |_| true).unwrap_err();
    assert!(matches!(error, EvalError::Answer { .. }) && error.to_string().contains("test-question"), "{error}");
    let mute = scripted(|_: &str| String::new());
    assert!(matches!(run(&mute, &plan(&[Task::Count], 50), &mut |step| step.done < 3), Err(EvalError::Stopped)));
    assert!(mute.asked.lock().unwrap().len() < 10);
}
