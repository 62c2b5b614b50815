//! Plans and reports, with answerers that need no model.

use std::sync::Mutex;

use keye_eval::{AnswerError, Answerer, EvalError, Plan, run};
use keye_media::{Loader, MediaConfig, MediaItem};
use keye_world::{Split, Task, World};

/// Answers by a function, and notes what it was asked.
struct Scripted<F> {
    script: F,
    asked: Mutex<Vec<(bool, String)>>,
}

impl<F: Fn(&str) -> String + Sync> Answerer for Scripted<F> {
    fn answer(&self, media: Option<MediaItem>, question: &str) -> Result<String, AnswerError> {
        self.asked.lock().unwrap().push((media.is_some(), question.to_owned()));
        if let Some(item) = &media {
            let media = Loader::new(MediaConfig::slow_fast()).load(item, &mut |_| true)?;
            assert!(media.frames.len() >= 4 && media.frames[0].timestamp == Some(0.0));
        }
        Ok((self.script)(question))
    }
}

fn scripted<F: Fn(&str) -> String + Sync>(script: F) -> Scripted<F> {
    Scripted { script, asked: Mutex::default() }
}

fn plan(tasks: &[Task], count: u64) -> Plan {
    Plan { split: Split::Test, tasks: tasks.to_vec(), count, text_only: true, at_once: 2 }
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

#[test]
fn silence_scores_nothing_and_yes_scores_about_half() {
    let mute = scripted(|_: &str| String::new());
    let report = run(&mute, &plan(&[Task::Attribute, Task::When, Task::Count], 20), &mut |_| true).unwrap();
    assert!(report.rows.iter().all(|row| row.score == 0.0 && row.exact == 0.0 && row.chance > 0.0));
    assert!(mute.asked.lock().unwrap().iter().all(|(media, _)| !media));

    let yes = scripted(|_: &str| "Yes.".to_owned());
    let report = run(&yes, &plan(&[Task::Trap], 300), &mut |_| true).unwrap();
    assert!((0.2..0.6).contains(&report.rows[0].score), "{report:?}");
}

#[test]
fn a_failure_ends_it_and_so_does_the_caller() {
    struct Broken;
    impl Answerer for Broken {
        fn answer(&self, _: Option<MediaItem>, _: &str) -> Result<String, AnswerError> {
            Err(AnswerError::Stopped)
        }
    }
    let error = run(&Broken, &plan(&[Task::Count], 50), &mut |_| true).unwrap_err();
    assert!(matches!(error, EvalError::Answer { .. }) && error.to_string().contains("test-question"), "{error}");
    let mute = scripted(|_: &str| String::new());
    assert!(matches!(run(&mute, &plan(&[Task::Count], 50), &mut |step| step.done < 3), Err(EvalError::Stopped)));
    assert!(mute.asked.lock().unwrap().len() < 10);
}
